-- Jobs. A job that has not ended is in PREFIX:jobs:held, with the time (milliseconds) until which its owner holds
-- it, or since when nobody does; an attached one is in PREFIX:jobs:attended too, with the time until which its
-- driver is taken to be there. Who owns a job is told by the fence of its last claim alone.
-- include: lapse

local KEPT_S = 7 * 86400
local ENDS = {done = true, failed = true, cancelled = true}

local function job_key(prefix, id)
  return prefix .. ':job:' .. id
end

local function job_events_key(prefix, id)
  return prefix .. ':job-events:' .. id
end

local function job_told_key(prefix, id)
  return prefix .. ':job-told:' .. id
end

local function held_key(prefix)
  return prefix .. ':jobs:held'
end

local function attended_key(prefix)
  return prefix .. ':jobs:attended'
end

-- Tell whether a job is attached, goes on, and its driver is gone.
local function job_is_abandoned(prefix, id, now)
  local until_ms = redis.call('ZSCORE', attended_key(prefix), id)
  return until_ms and tonumber(until_ms) <= lapse_ms(prefix, now)
end

-- Return {spec, state, created, ended or '', owner, cancel, abandoned, error, results}; false where there is none.
local function job_read(prefix, id, now)
  local fields = redis.call('HMGET', job_key(prefix, id),
    'spec', 'state', 'created', 'ended', 'owner', 'cancel', 'error', 'results')
  if not fields[1] then
    return false
  end
  return {
    fields[1], fields[2], fields[3], fields[4] or '', fields[5], fields[6],
    job_is_abandoned(prefix, id, now) and 1 or 0, fields[7], fields[8],
  }
end

-- End a job that goes on: its record, and the marker that those who follow it wait for, in one step.
local function job_end(prefix, id, stamp, state, failure, results, event)
  local key, events, told = job_key(prefix, id), job_events_key(prefix, id), job_told_key(prefix, id)
  redis.call('HSET', key, 'state', state, 'ended', stamp, 'error', failure, 'results', results)
  redis.call('ZREM', held_key(prefix), id)
  redis.call('ZREM', attended_key(prefix), id)
  redis.call('XADD', events, '*', 'k', 'job-ended', 'p', event)
  for _, kept in ipairs({key, events, told}) do
    redis.call('EXPIRE', kept, KEPT_S)
  end
end
