-- Ask for a job to be cancelled; one that nobody ever owned is cancelled at once.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] job ID
-- ARGV[2] the event that tells of its end, payload
-- return  its state then, or nil if it is unknown
-- Safe to repeat.
-- include: time
-- include: stamp
-- include: job
local prefix, id = KEYS[1], ARGV[1]
local state = redis.call('HGET', job_key(prefix, id), 'state')
if not state or ENDS[state] then
  return state
end
redis.call('HSET', job_key(prefix, id), 'cancel', 1)
if state == 'queued' then
  job_end(prefix, id, now_us(), 'cancelled', '', '', ARGV[2])
  return 'cancelled'
end
return state
