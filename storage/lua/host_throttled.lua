-- Record a 429: nobody asks for a while, and limit and rate are halved, once for a burst of them.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] host
-- ARGV[2] milliseconds until anybody may ask again
-- ARGV[3] configured limit
-- ARGV[4] configured requests a second, 0 for any
-- ARGV[5] milliseconds within which 429s are one burst
-- ARGV[6] name of the request's slot
-- return  1 if the host was given up until now, else 0
-- include: time
-- include: host
-- include: rate
-- include: circuit
local prefix, host = KEYS[1], ARGV[1]
local now = now_ms()
local known = redis.call('HMGET', prefix .. ':host:' .. host, 'not_before', 'halved')
local not_before = math.max(tonumber(known[1] or 0), now + tonumber(ARGV[2]))
local limit = host_limit(prefix, host, tonumber(ARGV[3]))
if now - tonumber(known[2] or 0) > tonumber(ARGV[5]) then
  limit = math.max(1, limit / 2)
  host_set(prefix, host, 'limit', limit, 'halved', now)
  host_slow_down(prefix, host, tonumber(ARGV[4]), now)
end
host_set(prefix, host, 'not_before', not_before)
redis.call('HINCRBY', prefix .. ':host:' .. host, 'refused', 1)
return circuit_answered(prefix, host, ARGV[6]) and 1 or 0
