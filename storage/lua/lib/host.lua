-- The limit of a registry host: `limit` is what 429s have brought it down to; without one it is the
-- configured one. Forgotten after an hour without a request or a 429.

local HOST_S = 3600

-- Return how many requests may be under way, at least 1, and whether that is less than configured.
local function host_limit(prefix, host, configured)
  local limit = tonumber(redis.call('HGET', prefix .. ':host:' .. host, 'limit'))
  if limit and limit < configured then
    return math.max(1, limit), true
  end
  return configured, false
end

local function host_set(prefix, host, ...)
  redis.call('HSET', prefix .. ':host:' .. host, ...)
  redis.call('EXPIRE', prefix .. ':host:' .. host, HOST_S)
  redis.call('SADD', prefix .. ':hosts', host)
end
