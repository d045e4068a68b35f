-- Take one of a host's slots, or a place in the queue for one. Who came first is served first; who is not
-- seen for a while loses its place, and a slot that is not renewed comes back.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] host
-- ARGV[2] name of the slot: unique to this request
-- ARGV[3] configured limit
-- ARGV[4] milliseconds that a slot is kept without renewal
-- ARGV[5] milliseconds that a place in the queue is kept without asking again
-- return  {1 if taken else 0, milliseconds until anybody may ask the host, how many come before, 1 if the limit is reduced}
-- Safe to repeat.
-- include: time
-- include: host
local prefix, host, slot = KEYS[1], ARGV[1], ARGV[2]
local now = now_ms()
local slots, queue, seen = prefix .. ':slots:' .. host, prefix .. ':queue:' .. host, prefix .. ':queue-seen:' .. host
redis.call('ZREMRANGEBYSCORE', slots, '-inf', now)
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', seen, '-inf', now)) do
  redis.call('ZREM', queue, gone)
  redis.call('ZREM', seen, gone)
end

local limit, is_reduced = host_limit(prefix, host, tonumber(ARGV[3]))
local reduced = is_reduced and 1 or 0
local not_before = tonumber(redis.call('HGET', prefix .. ':host:' .. host, 'not_before') or 0)
local free = math.floor(limit) - redis.call('ZCARD', slots)
local before = redis.call('ZRANK', queue, slot) or redis.call('ZCARD', queue)
if redis.call('ZSCORE', slots, slot) or (now >= not_before and before < free) then
  redis.call('ZREM', queue, slot)
  redis.call('ZREM', seen, slot)
  redis.call('ZADD', slots, now + tonumber(ARGV[4]), slot)
  redis.call('PEXPIRE', slots, ARGV[4])
  return {1, 0, 0, reduced}
end
local last = redis.call('ZRANGE', queue, -1, -1, 'WITHSCORES')
redis.call('ZADD', queue, 'NX', (last[2] or 0) + 1, slot)
redis.call('ZADD', seen, now + tonumber(ARGV[5]), slot)
redis.call('PEXPIRE', queue, ARGV[5])
redis.call('PEXPIRE', seen, ARGV[5])
return {0, math.max(0, not_before - now), math.max(0, before - math.max(0, free)), reduced}
