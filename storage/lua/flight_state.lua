-- Read a flight, for people.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] key
-- return  {fence, owner, milliseconds left, aborting, current bytes, total bytes, waiters, parts uploaded}, or nil
-- include: time
-- include: flight
local prefix, key = KEYS[1], ARGV[1]
local now = now_ms()
local held = redis.call('HMGET', flight_key(prefix, key), 'fence', 'owner', 'expires', 'aborting', 'current', 'total')
if not held[1] or tonumber(held[3]) <= now then
  return false
end
return {
  held[1], held[2], tonumber(held[3]) - now, held[4], held[5], held[6],
  flight_waiters(prefix, key, now), redis.call('HLEN', parts_key(prefix, key)),
}
