-- Record a job with its definition.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] job ID
-- ARGV[2] spec, payload
-- ARGV[3] definition, payload
-- ARGV[4] milliseconds for which its driver is taken to be there; '' for a detached job
-- return  the job as lib/job reads it, or nil if the ID is another job's: then nothing has changed
-- Safe to repeat.
-- include: time
-- include: stamp
-- include: job
local prefix, id, spec, definition, attended = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local now, jobs, key = now_ms(), KEYS[1] .. ':jobs', job_key(KEYS[1], ARGV[1])

local known = redis.call('HMGET', key, 'spec', 'definition')
if known[1] then
  if known[1] ~= spec or known[2] ~= definition then
    return false
  end
  return job_read(prefix, id, now)
end

-- The oldest of the index: what has expired is taken out, a bounded part each time.
for _, old in ipairs(redis.call('ZRANGE', jobs, 0, 7)) do
  if redis.call('EXISTS', job_key(prefix, old)) == 0 then
    redis.call('ZREM', jobs, old)
  end
end
local stamp = now_us()
redis.call('HSET', key,
  'spec', spec, 'definition', definition, 'state', 'queued', 'created', stamp,
  'owner', '', 'fence', 0, 'cancel', 0, 'error', '', 'results', '')
redis.call('ZADD', jobs, stamp, id)
redis.call('ZADD', held_key(prefix), now, id)
if attended ~= '' then
  redis.call('ZADD', attended_key(prefix), now + tonumber(attended), id)
end
return job_read(prefix, id, now)
