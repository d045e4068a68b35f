-- Flights. PREFIX:flight:KEY is the owner's hold: it is live while its `expires` (milliseconds) lies
-- ahead, and only for who names all of its epoch, fence and token. What a lapsed one says is kept until
-- somebody takes over, or for a day.

local DAY_S = 86400
local OUTCOME_S = 60

local function flight_key(prefix, key)
  return prefix .. ':flight:' .. key
end

local function waiters_key(prefix, key)
  return prefix .. ':waiters:' .. key
end

local function parts_key(prefix, key)
  return prefix .. ':parts:' .. key
end

-- Tell whether (epoch, fence, token) owns the flight of `key`, now.
local function flight_is_owner(prefix, key, epoch, fence, token, now)
  local held = redis.call('HMGET', flight_key(prefix, key), 'epoch', 'fence', 'token', 'expires')
  return held[1] == epoch and held[2] == fence and held[3] == token and tonumber(held[4]) > now
end

-- Count who still waits. The lapsed stay on record for a while: one that was late to renew is still there.
local function flight_waiters(prefix, key, now)
  return redis.call('ZCOUNT', waiters_key(prefix, key), '(' .. now, '+inf')
end

local function flight_publish(prefix, key, event)
  redis.call('PUBLISH', prefix .. ':events:' .. key, event)
end

-- Note that the flight of `key` is under way, for who lists them, and let go of a few that died unnoticed.
local function flight_note(prefix, key, now)
  local flights = prefix .. ':flights'
  for _, other in ipairs(redis.call('SPOP', flights, 2)) do
    if tonumber(redis.call('HGET', flight_key(prefix, other), 'expires') or 0) > now then
      redis.call('SADD', flights, other)
    end
  end
  redis.call('SADD', flights, key)
end

-- Return what people are told of a flight; nil where none is under way.
local function flight_told(prefix, key, now)
  local held = redis.call('HMGET', flight_key(prefix, key), 'fence', 'owner', 'expires', 'aborting', 'current', 'total')
  if not held[1] or tonumber(held[3]) <= now then
    return nil
  end
  return {
    held[1], held[2], tonumber(held[3]) - now, held[4], held[5], held[6],
    flight_waiters(prefix, key, now), redis.call('HLEN', parts_key(prefix, key)),
  }
end

-- Keep and tell how the flight under that fence ended.
local function flight_settle(prefix, key, fence, event)
  redis.call('SREM', prefix .. ':flights', key)
  redis.call('SET', prefix .. ':outcome:' .. key .. ':' .. fence, event, 'EX', OUTCOME_S)
  flight_publish(prefix, key, event)
end

-- Forget what upload there was to resume.
local function upload_forget(prefix, key)
  redis.call('DEL', prefix .. ':upload:' .. key, parts_key(prefix, key))
end
