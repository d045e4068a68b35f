-- Ask for a job to be cancelled; one that nobody ever owned is cancelled at once.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] job ID
-- ARGV[2] the event that tells of its end, payload
-- ARGV[3] limits of the audit stream (lib/audit.lua); '' to note nothing
-- ARGV[4] entry for it, payload
-- return  its state then, or nil if it is unknown
-- Safe to repeat.
-- include: time
-- include: stamp
-- include: job
-- include: audit
local prefix, id = KEYS[1], ARGV[1]
local state = redis.call('HGET', job_key(prefix, id), 'state')
if not state or ENDS[state] then
  return state
end
if redis.call('HGET', job_key(prefix, id), 'cancel') ~= '1' then
  audit_note(prefix, ARGV[3], {ARGV[4]}, now_ms())
end
redis.call('HSET', job_key(prefix, id), 'cancel', 1)
if state == 'queued' then
  job_end(prefix, id, now_us(), 'cancelled', '', '', ARGV[2])
  return 'cancelled'
end
return state
