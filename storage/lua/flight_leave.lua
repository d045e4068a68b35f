-- Stop waiting. If nobody is left waiting, the owner is woken.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] key
-- ARGV[2] worker
-- ARGV[3] version of payloads
-- return  1 if nobody is left waiting, else 0
-- include: time
-- include: flight
local prefix, key = KEYS[1], ARGV[1]
local now = now_ms()
redis.call('ZREM', waiters_key(prefix, key), ARGV[2])
if flight_waiters(prefix, key, now) > 0 then
  return 0
end
local held = redis.call('HMGET', flight_key(prefix, key), 'fence', 'expires', 'current', 'total')
if held[1] and tonumber(held[2]) > now then
  -- The progress as it is: news only in that it comes.
  flight_publish(prefix, key, cmsgpack.pack({tonumber(ARGV[3]), 'progressed', {
    fence_number = tonumber(held[1]), current_bytes = tonumber(held[3]), total_bytes = tonumber(held[4]),
  }}))
end
return 1
