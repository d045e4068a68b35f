-- Take one of a host's slots and one request of its rate, or a place in the queue for them. Who came first is
-- served first; who is not seen for a while loses its place, and a slot that is not renewed comes back. A host that
-- was given up is asked by one request at a time, a probe, and by that only now and then. Who waits for what little
-- its account may still ask has no place in the queue: others, who needn't, go past it.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] host
-- ARGV[2] name of the slot: unique to this request
-- ARGV[3] configured limit
-- ARGV[4] configured requests a second, 0 for any
-- ARGV[5] milliseconds that a slot is kept without renewal
-- ARGV[6] milliseconds that a place in the queue is kept without asking again
-- ARGV[7] milliseconds that a probe has before another may begin
-- ARGV[8] kind of the request
-- ARGV[9] account that makes it
-- ARGV[10] milliseconds that it can wait
-- return  {1 if taken, 2 if taken as the probe, else 0, milliseconds until Retry-After, rate and quota allow it, how
--         many come before, 1 if successes are worth telling: limit or rate is reduced, or requests failed, 1 if
--         little is left for the account}; or, where the host was given up, {-1, milliseconds until it is tried
--         again, milliseconds since, the last failure}; or, where Retry-After or quota allow it only after longer
--         than it can wait, {-2, milliseconds until then}
-- Safe to repeat: a slot that is held takes nothing of the rate again.
-- include: time
-- include: host
-- include: rate
-- include: circuit
-- include: quota
local prefix, host, slot = KEYS[1], ARGV[1], ARGV[2]
local now = now_ms()
local slots, queue, seen = prefix .. ':slots:' .. host, prefix .. ':queue:' .. host, prefix .. ':queue-seen:' .. host
redis.call('ZREMRANGEBYSCORE', slots, '-inf', now)
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', seen, '-inf', now)) do
  redis.call('ZREM', queue, gone)
  redis.call('ZREM', seen, gone)
end

local circuit = circuit_of(prefix, host)
if not circuit_admits(circuit, slot, now) then
  local tried_in = circuit.state == 'open' and circuit.retry_at - now or 0
  return {-1, tried_in, now - circuit.opened_at, circuit.failure}
end

local not_before = tonumber(redis.call('HGET', prefix .. ':host:' .. host, 'not_before') or 0)
local quota_ms, is_low = quota_wait_ms(prefix, host, ARGV[8], ARGV[9], slot, now, tonumber(ARGV[10]))
local told_ms = math.max(not_before - now, quota_ms)
if told_ms > tonumber(ARGV[10]) then
  return {-2, told_ms}
end

local limit, is_reduced = host_limit(prefix, host, tonumber(ARGV[3]))
local rate, is_slowed = host_rate(prefix, host, tonumber(ARGV[4]))
local reduced = (is_reduced or is_slowed or circuit.failures > 0) and 1 or 0
local free = math.floor(limit) - redis.call('ZCARD', slots)
local before = redis.call('ZRANK', queue, slot) or redis.call('ZCARD', queue)
local tokens, recent = host_asked(prefix, host, rate, now)
-- Those who come before take their tokens first.
local wait = math.max(0, not_before - now, host_refill_ms(rate, tokens, before + 1))
local low = is_low and 1 or 0
local is_held = redis.call('ZSCORE', slots, slot)
if is_held or (quota_ms == 0 and wait == 0 and before < free) then
  if not is_held then
    host_ask(prefix, host, rate, tokens, recent, now)
  end
  redis.call('ZREM', queue, slot)
  redis.call('ZREM', seen, slot)
  redis.call('ZADD', slots, now + tonumber(ARGV[5]), slot)
  redis.call('PEXPIRE', slots, ARGV[5])
  return {circuit_begun(prefix, host, circuit, slot, now, tonumber(ARGV[7])) and 2 or 1, 0, 0, reduced, low}
end
if quota_ms > 0 then
  redis.call('ZREM', queue, slot)
  redis.call('ZREM', seen, slot)
  return {0, quota_ms, 0, reduced, low}
end
local last = redis.call('ZRANGE', queue, -1, -1, 'WITHSCORES')
redis.call('ZADD', queue, 'NX', (last[2] or 0) + 1, slot)
redis.call('ZADD', seen, now + tonumber(ARGV[6]), slot)
redis.call('PEXPIRE', queue, ARGV[6])
redis.call('PEXPIRE', seen, ARGV[6])
return {0, wait, math.max(0, before - math.max(0, free)), reduced, low}
