-- Record that a request failed: no connection, no answer, or an error of the host's own. After too many in a row
-- nobody asks the host for a while.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] host
-- ARGV[2] name of the request's slot
-- ARGV[3] what happened
-- ARGV[4] failures in a row until the host is given up, 0 for never
-- ARGV[5] milliseconds for which it is
-- ARGV[6] milliseconds within which failures count as one
-- return  1 if this made the cluster give the host up, else 0
-- include: time
-- include: host
-- include: circuit
local opened = circuit_failed(
  KEYS[1], ARGV[1], ARGV[2], ARGV[3], now_ms(), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]))
return opened and 1 or 0
