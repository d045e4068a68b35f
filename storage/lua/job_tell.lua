-- Append events to a job's stream, within what a job may fill: its states always, its logs and the steps of its
-- layers up to a limit each. What is over is left out at the end, so that the start can always be replayed.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] job ID
-- ARGV[2] fence that must be that of the job's last claim; '' for any
-- ARGV[3] most bytes of log payloads
-- ARGV[4] most steps of layers
-- ARGV[5] version of payloads
-- ARGV[6…] for each event: what it counts as (state, log, step), its vertex, its kind, its payload
-- return  'ok' (also where the job has ended: nobody is to see what comes later), 'unknown' or 'stale'
-- include: job
local prefix, id = KEYS[1], ARGV[1]
local job = redis.call('HMGET', job_key(prefix, id), 'state', 'fence')
if not job[1] then
  return 'unknown'
end
if ARGV[2] ~= '' and ARGV[2] ~= job[2] then
  return 'stale'
end
if ENDS[job[1]] then
  return 'ok'
end
local events, told = job_events_key(prefix, id), job_told_key(prefix, id)

local function append(kind, payload)
  redis.call('XADD', events, '*', 'k', kind, 'p', payload)
end

local function has_room(field, size, most)
  if tonumber(redis.call('HGET', told, field) or 0) + size > most then
    return false
  end
  redis.call('HINCRBY', told, field, size)
  return true
end

for i = 6, #ARGV, 4 do
  local counts_as, vertex, kind, payload = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  if counts_as == 'log' then
    -- A vertex whose lines were left out gets no more: a log has one gap, at its end.
    if redis.call('HEXISTS', told, 'cut:' .. vertex) == 0 then
      if has_room('log_bytes', #payload, tonumber(ARGV[3])) then
        append(kind, payload)
      else
        redis.call('HSET', told, 'cut:' .. vertex, 1)
        append('vertex-log-dropped', cmsgpack.pack({tonumber(ARGV[5]), 'vertex-log-dropped', {vertex = vertex}}))
      end
    end
  elseif counts_as == 'state' or has_room('steps', 1, tonumber(ARGV[4])) then
    append(kind, payload)
  end
end
return 'ok'
