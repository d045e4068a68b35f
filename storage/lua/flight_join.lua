-- Join the flight of a key, or own it where nobody does.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] key
-- ARGV[2] worker that asks
-- ARGV[3] token of this attempt; '' to join only
-- ARGV[4] milliseconds that an owner or a waiter lives without renewing
-- ARGV[5] a random name, for a data set that has no epoch yet
-- ARGV[6] version of payloads
-- ARGV[7] limits of the audit stream (lib/audit.lua), which tells of a take-over
-- ARGV[8] the span that asks, which an owner works under, as a traceparent, or an empty string
-- return  {'present', blob record}
--         {'owned', epoch, fence, upload, parts, taken over}: upload is [key, upload ID, part bytes] or nil, parts
--             a flat list of numbers and ETags; taken over is 1 where another's hold had lapsed, else 0
--         {'joined', fence, owner, current bytes, total bytes, milliseconds left to the owner, the owner's span}
--         {'aborting', fence, milliseconds left}
--         {'free'}: nobody owns it, and this attempt was to join only; nothing has changed
-- Safe to repeat: who owns already, by the same token, is told so again.
-- include: time
-- include: flight
-- include: audit
local prefix, key, worker, token, ttl = KEYS[1], ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local now = now_ms()

local blob = redis.call('GET', prefix .. ':' .. key)
if blob then
  return {'present', blob}
end

local flight = flight_key(prefix, key)
local waiters = waiters_key(prefix, key)

local function owned(epoch, fence, taken_over)
  local upload = prefix .. ':upload:' .. key
  local fields = redis.call('HMGET', upload, 'key', 'upload_id', 'part_bytes')
  return {'owned', epoch, fence, fields[1] and fields, redis.call('HGETALL', parts_key(prefix, key)), taken_over}
end

local held = redis.call('HMGET', flight, 'fence', 'token', 'owner', 'expires', 'aborting', 'current', 'total', 'epoch',
  'trace')
local last = held[1]
local left = last and tonumber(held[4]) - now or 0
if left > 0 then
  if held[5] == '1' then
    return {'aborting', last, left}
  end
  if held[2] == token then
    return owned(held[8], last, 0)
  end
  redis.call('ZADD', waiters, now + ttl, worker)
  redis.call('EXPIRE', waiters, DAY_S)
  -- An owner of an older release told of none.
  return {'joined', last, held[3], held[6], held[7], left, held[9] or ''}
end

if token == '' then
  return {'free'}
end

if last then
  -- Its owner died: whoever waits under that fence has to join again.
  local vacated = cmsgpack.pack({tonumber(ARGV[6]), 'vacated', {fence_number = tonumber(last)}})
  flight_settle(prefix, key, last, vacated)
end
redis.call('SET', prefix .. ':epoch', ARGV[5], 'NX')
local epoch = redis.call('GET', prefix .. ':epoch')
local fence = redis.call('INCR', prefix .. ':fence')
redis.call('DEL', flight)
redis.call('HSET', flight,
  'epoch', epoch, 'fence', fence, 'token', token, 'owner', worker, 'expires', now + ttl,
  'aborting', 0, 'current', 0, 'total', 0, 'trace', ARGV[8])
redis.call('EXPIRE', flight, DAY_S)
redis.call('ZREM', waiters, worker)
flight_note(prefix, key, now)
local answer = owned(epoch, tostring(fence), last and 1 or 0)
if last then
  audit_note(prefix, ARGV[7], {cmsgpack.pack({tonumber(ARGV[6]), 'audit', {
    operation = 'take-over', outcome = answer[4] and 'resumed' or 'afresh', by = worker, source = held[3],
    digest = string.match(key, '^blob:(.+)$') or '', fence = fence,
  }})}, now)
end
return answer
