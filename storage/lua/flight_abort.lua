-- Start aborting if nobody waits; from then on nobody may join.
--
-- KEYS[1]    prefix of the farm's keys
-- ARGV[1]    key
-- ARGV[2…4]  epoch, fence, token
-- return     1 if the flight is aborting, 0 if somebody waits, -1 if it owns no more: then nothing has changed
-- include: time
-- include: flight
local prefix, key = KEYS[1], ARGV[1]
local now = now_ms()
if not flight_is_owner(prefix, key, ARGV[2], ARGV[3], ARGV[4], now) then
  return -1
end
local flight = flight_key(prefix, key)
if redis.call('HGET', flight, 'aborting') == '1' then
  return 1
end
if flight_waiters(prefix, key, now) > 0 then
  return 0
end
redis.call('HSET', flight, 'aborting', 1)
redis.call('DEL', waiters_key(prefix, key))
return 1
