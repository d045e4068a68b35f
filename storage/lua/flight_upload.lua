-- Record the upload that the owner has begun, or, without arguments from ARGV[5] on, forget the recorded one.
--
-- KEYS[1]    prefix of the farm's keys
-- ARGV[1]    key
-- ARGV[2…4]  epoch, fence, token
-- ARGV[5…7]  object key, upload ID, bytes of a part
-- ARGV[8…]   part number, ETag, part number, ETag, …
-- return     1, or 0 if it owns no more: then nothing has changed
-- include: time
-- include: flight
local prefix, key = KEYS[1], ARGV[1]
if not flight_is_owner(prefix, key, ARGV[2], ARGV[3], ARGV[4], now_ms()) then
  return 0
end
upload_forget(prefix, key)
if ARGV[5] then
  local upload = prefix .. ':upload:' .. key
  redis.call('HSET', upload, 'key', ARGV[5], 'upload_id', ARGV[6], 'part_bytes', ARGV[7])
  redis.call('EXPIRE', upload, DAY_S)
  for i = 8, #ARGV, 2 do
    redis.call('HSET', parts_key(prefix, key), ARGV[i], ARGV[i + 1])
  end
  redis.call('EXPIRE', parts_key(prefix, key), DAY_S)
end
return 1
