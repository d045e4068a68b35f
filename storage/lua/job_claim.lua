-- Claim jobs that nobody holds: new ones, and those whose owner stopped renewing; longest without an owner first.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] who claims
-- ARGV[2] milliseconds for which they are held without renewing
-- ARGV[3] how many at most
-- return  a list of {job ID, fence, definition, the job as lib/job reads it}
-- include: time
-- include: job
local prefix, owner = KEYS[1], ARGV[1]
local now, held, claimed = now_ms(), held_key(KEYS[1]), {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', held, '-inf', now, 'LIMIT', 0, tonumber(ARGV[3]))) do
  local key = job_key(prefix, id)
  local definition = redis.call('HGET', key, 'definition')
  if definition then
    local fence = redis.call('INCR', prefix .. ':fence')
    redis.call('HSET', key, 'state', 'running', 'owner', owner, 'fence', fence)
    redis.call('ZADD', held, now + tonumber(ARGV[2]), id)
    claimed[#claimed + 1] = {id, fence, definition, job_read(prefix, id, now)}
  else
    redis.call('ZREM', held, id)
  end
end
return claimed
