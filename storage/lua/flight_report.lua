-- Tell how far the owner is: to those who listen now, and to those who join later.
--
-- KEYS[1]    prefix of the farm's keys
-- ARGV[1]    key
-- ARGV[2…4]  epoch, fence, token
-- ARGV[5]    bytes so far
-- ARGV[6]    bytes in all
-- ARGV[7]    the event, payload
-- return     1, or 0 if it owns no more: then nothing has changed
-- include: time
-- include: flight
local prefix, key = KEYS[1], ARGV[1]
if not flight_is_owner(prefix, key, ARGV[2], ARGV[3], ARGV[4], now_ms()) then
  return 0
end
redis.call('HSET', flight_key(prefix, key), 'current', ARGV[5], 'total', ARGV[6])
flight_publish(prefix, key, ARGV[7])
return 1
