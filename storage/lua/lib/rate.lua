-- include: host
-- The request rate of a registry host: a token bucket that holds what may be asked in one second. `rate` is
-- what 429s have brought it down to, `lift_at` where that ends if none is configured; without them it is the
-- configured one. `tokens` and `recent` are as of `asked_at`; `recent` counts requests, each for less and less
-- as it gets older, so that divided by RECENT_S it is the rate of late.

local RECENT_S = 2
-- Without a configured rate a lowered one ends here, as a multiple: twice what was asked when the 429 came.
local LIFT = 4

-- Return requests a second, 0 for no limit, and whether 429s have brought it down.
local function host_rate(prefix, host, configured)
  local rate = tonumber(redis.call('HGET', prefix .. ':host:' .. host, 'rate'))
  if rate and (configured == 0 or rate < configured) then
    return rate, true
  end
  return configured, false
end

-- Return the tokens that are there now, and the count of recent requests. Without a limit one token is always
-- there: if a 429 sets one, whoever got it may try again, all others at the new rate.
local function host_asked(prefix, host, rate, now)
  local known = redis.call('HMGET', prefix .. ':host:' .. host, 'tokens', 'recent', 'asked_at')
  local passed_s = math.max(0, now - tonumber(known[3] or now)) / 1000
  local capacity = math.max(1, rate)
  local tokens = 1
  if rate > 0 then
    tokens = math.min(capacity, tonumber(known[1] or capacity) + passed_s * rate)
  end
  return tokens, tonumber(known[2] or 0) * math.exp(-passed_s / RECENT_S)
end

-- Return milliseconds until there are as many tokens as are wanted, an hour at most: more is not remembered.
local function host_refill_ms(rate, tokens, wanted)
  if rate == 0 or tokens >= wanted then
    return 0
  end
  return math.ceil(math.min(HOST_S, (wanted - tokens) / rate) * 1000)
end

-- Count one request and take its token, of what host_asked told.
local function host_ask(prefix, host, rate, tokens, recent, now)
  host_set(prefix, host, 'tokens', rate > 0 and tokens - 1 or tokens, 'recent', recent + 1, 'asked_at', now)
end

-- Lower the rate to half of what was asked of late, not below one a second, and leave one token at most. Where
-- less than that is configured, it holds on.
local function host_slow_down(prefix, host, configured, now)
  local rate = host_rate(prefix, host, configured)
  local tokens, recent = host_asked(prefix, host, rate, now)
  local asked = recent / RECENT_S
  if rate > 0 then
    asked = math.min(rate, asked)
  end
  local lowered = math.max(1, asked / 2)
  host_set(prefix, host, 'rate', lowered, 'lift_at', LIFT * lowered)
  host_set(prefix, host, 'tokens', math.min(1, tokens), 'recent', recent, 'asked_at', now)
end

-- Raise a lowered rate: by one a second in a second of nothing but successes.
local function host_speed_up(prefix, host, configured)
  local rate, is_lowered = host_rate(prefix, host, configured)
  if not is_lowered then
    return
  end
  local key = prefix .. ':host:' .. host
  local ends = configured > 0 and configured or tonumber(redis.call('HGET', key, 'lift_at'))
  rate = rate + 1 / rate
  if rate < ends then
    host_set(prefix, host, 'rate', rate)
  else
    redis.call('HDEL', key, 'rate', 'lift_at')
  end
end
