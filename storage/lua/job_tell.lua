-- Append events to a job's stream, within what a job may fill: its states always, its logs and the steps of its
-- layers up to a limit each. What is over is left out at the end, so that the start can always be replayed.
--
-- Many may tell of one layer of a vertex, as each one that waits for it does. It is told once: a step only where it
-- takes the layer on, an end only where the layer has not ended, or has ended for one that gave up while another went
-- on. Once it is reached nothing more is told of it: words of those who waited come late. After it was given up a step
-- begins it anew.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] job ID
-- ARGV[2] fence that must be that of the job's last claim; '' for any
-- ARGV[3] most bytes of log payloads
-- ARGV[4] most steps of layers
-- ARGV[5] version of payloads
-- ARGV[6…] for each event five: what it counts as (state, log, layer), its subject (the vertex, or for a layer the
--         vertex and the item), for a layer 'step PHASE BYTES', 'reached' or 'given-up', its kind, its payload
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

-- Tell whether it is worth telling that a layer is at *now*, where *last* (false for nothing) was told before.
local function takes_on(last, now)
  if not last then
    return true
  elseif last == 'reached' then
    return false
  elseif now == 'reached' then
    return true
  elseif now == 'given-up' then
    return last ~= 'given-up'
  end
  local last_phase, last_bytes = string.match(last, '^step (%S+) (%d+)$')
  local phase, bytes = string.match(now, '^step (%S+) (%d+)$')
  if not last_phase then
    return true -- it had been given up
  elseif phase ~= last_phase then
    return phase ~= 'waiting'
  end
  return tonumber(bytes) > tonumber(last_bytes)
end

for i = 6, #ARGV, 5 do
  local counts_as, subject, at, kind, payload = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
  if counts_as == 'log' then
    -- A vertex whose lines were left out gets no more: a log has one gap, at its end.
    if redis.call('HEXISTS', told, 'cut:' .. subject) == 0 then
      if has_room('log_bytes', #payload, tonumber(ARGV[3])) then
        append(kind, payload)
      else
        redis.call('HSET', told, 'cut:' .. subject, 1)
        append('vertex-log-dropped', cmsgpack.pack({tonumber(ARGV[5]), 'vertex-log-dropped', {vertex = subject}}))
      end
    end
  elseif counts_as == 'state' then
    append(kind, payload)
  elseif takes_on(redis.call('HGET', told, 'layer:' .. subject), at) then
    if string.sub(at, 1, 5) ~= 'step ' or has_room('steps', 1, tonumber(ARGV[4])) then
      redis.call('HSET', told, 'layer:' .. subject, at)
      append(kind, payload)
    end
  end
end
return 'ok'
