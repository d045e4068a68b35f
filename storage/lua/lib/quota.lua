-- What an account may still ask of one kind at a registry host, where that is little: `every` milliseconds between two
-- requests, `last_at` when the last of those that have a turn is made, `hold_at` until when none is of use, `until_at`
-- when all is there again, `left` how many requests the registry said were left. Beside it the turns: who waits → when
-- its turn is. `quotas:HOST` names those of a host: `KIND:ACCOUNT` → `until_at`. `enough:HOST` is of those of which
-- enough is left, and for people alone: `KIND:ACCOUNT` → `LEFT LIMIT UNTIL_AT`.

-- As long as any is believed: a day.
local QUOTAS_S = 86400

local function quota_keys(prefix, host, kind, account)
  local name = kind .. ':' .. #account .. ':' .. account .. ':' .. host
  return prefix .. ':quota:' .. name, prefix .. ':turns:' .. name
end

-- What is told of those of which enough is left, that nothing new was heard of for so long, is told no more.
local ENOUGH_S = 3600
-- Accounts of a host of which that is kept, at most.
local ENOUGH_MOST = 1000

-- Note what is left: 0 for `for_ms` where that is enough.
local function quota_set(prefix, host, kind, account, every_ms, hold_ms, for_ms, left, now)
  local quota, turns = quota_keys(prefix, host, kind, account)
  local quotas, name = prefix .. ':quotas:' .. host, kind .. ':' .. account
  redis.call('ZREMRANGEBYSCORE', quotas, '-inf', now)
  redis.call('HDEL', prefix .. ':enough:' .. host, name)
  if for_ms == 0 then
    redis.call('DEL', quota, turns)
    redis.call('ZREM', quotas, name)
    return
  end
  local last_at = math.max(now, tonumber(redis.call('HGET', quota, 'last_at') or 0))
  redis.call('HSET', quota, 'every', every_ms, 'last_at', last_at, 'hold_at', now + hold_ms, 'until_at', now + for_ms)
  redis.call('HSET', quota, 'left', left)
  redis.call('PEXPIREAT', quota, now + for_ms)
  redis.call('ZADD', quotas, now + for_ms, name)
  redis.call('EXPIRE', quotas, QUOTAS_S)
end

-- Note for people how much is left where that is enough: `limit` is 0 where the registry doesn't say.
local function quota_tell(prefix, host, kind, account, left, limit, for_ms, now)
  if redis.call('EXISTS', (quota_keys(prefix, host, kind, account))) == 1 then
    return
  end
  local enough = prefix .. ':enough:' .. host
  if redis.call('HLEN', enough) >= ENOUGH_MOST then
    redis.call('DEL', enough)
  end
  redis.call('HSET', enough, kind .. ':' .. account, ('%s %s %d'):format(left, limit, now + for_ms))
  redis.call('EXPIRE', enough, ENOUGH_S)
end

-- Return {kind, requests left, milliseconds until all is there again, milliseconds until any is of use} of each of a
-- host's that little is left of, and {kind, requests left, milliseconds likewise, requests in all or 0} of each other.
-- Requests left are nil where an earlier release noted it anew.
local function quota_list(prefix, host, now)
  local found, enough = {}, {}
  local told = redis.call('HGETALL', prefix .. ':enough:' .. host)
  for place = 1, #told, 2 do
    local left, limit, until_at = told[place + 1]:match('^(%d+) (%d+) (%d+)$')
    if tonumber(until_at) > now then
      table.insert(enough, {told[place]:match('^[^:]*'), tonumber(left), until_at - now, tonumber(limit)})
    end
  end
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', prefix .. ':quotas:' .. host, '(' .. now, '+inf')) do
    local kind, account = name:match('^([^:]*):(.*)$')
    local known = redis.call('HMGET', (quota_keys(prefix, host, kind, account)), 'left', 'hold_at', 'until_at')
    if known[3] then
      table.insert(found, {kind, known[1], known[3] - now, math.max(0, known[2] - now)})
    end
  end
  return found, enough
end

-- Return milliseconds until a request may be made, and whether little is left. It gets a turn if that is within what
-- it can wait.
local function quota_wait_ms(prefix, host, kind, account, slot, now, patience_ms)
  local quota, turns = quota_keys(prefix, host, kind, account)
  local known = redis.call('HMGET', quota, 'every', 'last_at', 'hold_at', 'until_at')
  if not known[1] then
    return 0, false
  end
  local hold_at, until_at = tonumber(known[3]), tonumber(known[4])
  if hold_at > now then
    return hold_at - now, true
  end
  local at = redis.call('ZSCORE', turns, slot)
  if not at then
    at = math.min(until_at, math.max(now, tonumber(known[2]) + tonumber(known[1])))
    if at - now <= patience_ms then
      redis.call('ZADD', turns, at, slot)
      redis.call('PEXPIREAT', turns, until_at)
      redis.call('HSET', quota, 'last_at', at)
    end
  end
  return math.max(0, at - now), true
end

-- Forget a request's turn: it was made, or won't be.
local function quota_left(prefix, host, kind, account, slot)
  local _, turns = quota_keys(prefix, host, kind, account)
  redis.call('ZREM', turns, slot)
end
