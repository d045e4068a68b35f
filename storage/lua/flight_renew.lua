-- Renew an ownership.
--
-- KEYS[1]    prefix of the farm's keys
-- ARGV[1]    key
-- ARGV[2…4]  epoch, fence, token
-- ARGV[5]    milliseconds from now
-- return     1, or 0 if it owns no more: then nothing has changed
-- include: time
-- include: flight
local prefix, key = KEYS[1], ARGV[1]
local now = now_ms()
if not flight_is_owner(prefix, key, ARGV[2], ARGV[3], ARGV[4], now) then
  return 0
end
local flight = flight_key(prefix, key)
redis.call('HSET', flight, 'expires', now + tonumber(ARGV[5]))
redis.call('EXPIRE', flight, DAY_S)
return 1
