-- End a job, by its owner.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] job ID
-- ARGV[2] fence
-- ARGV[3] state: done, failed or cancelled
-- ARGV[4] error, payload; may be empty
-- ARGV[5] results, payload; may be empty
-- ARGV[6] the event that tells of it, payload
-- return  'ok', 'unknown', 'stale' (another owns it) or the state in which it has ended before: then nothing has
--         changed
-- Safe to repeat: who has ended it so, by that fence, is told 'ok' again.
-- include: time
-- include: stamp
-- include: job
local prefix, id = KEYS[1], ARGV[1]
local fields = redis.call('HMGET', job_key(prefix, id), 'fence', 'state', 'error', 'results')
if not fields[1] then
  return 'unknown'
end
local is_owner = fields[1] == ARGV[2]
if ENDS[fields[2]] then
  if is_owner and fields[2] == ARGV[3] and fields[3] == ARGV[4] and fields[4] == ARGV[5] then
    return 'ok'
  end
  return fields[2]
end
if not is_owner then
  return 'stale'
end
job_end(prefix, id, now_us(), ARGV[3], ARGV[4], ARGV[5], ARGV[6])
return 'ok'
