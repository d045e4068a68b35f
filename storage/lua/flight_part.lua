-- Record one uploaded part.
--
-- KEYS[1]    prefix of the farm's keys
-- ARGV[1]    key
-- ARGV[2…4]  epoch, fence, token
-- ARGV[5]    part number
-- ARGV[6]    ETag
-- return     1, or 0 if it owns no more: then nothing has changed
-- include: time
-- include: flight
local prefix, key = KEYS[1], ARGV[1]
if not flight_is_owner(prefix, key, ARGV[2], ARGV[3], ARGV[4], now_ms()) then
  return 0
end
local upload = prefix .. ':upload:' .. key
redis.call('HSET', parts_key(prefix, key), ARGV[5], ARGV[6])
redis.call('EXPIRE', upload, DAY_S)
redis.call('EXPIRE', parts_key(prefix, key), DAY_S)
return 1
