-- Record a success: the limit grows by one for as many successes as it is high, and so does the rate. The probe of
-- a host that was given up opens it to all.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] host
-- ARGV[2] configured limit
-- ARGV[3] configured requests a second, 0 for any
-- ARGV[4] name of the request's slot
-- return  1 if the host was given up until now, else 0
-- include: host
-- include: rate
-- include: circuit
local configured = tonumber(ARGV[2])
local limit, is_reduced = host_limit(KEYS[1], ARGV[1], configured)
if is_reduced then
  limit = math.min(configured, limit + 1 / limit)
  host_set(KEYS[1], ARGV[1], 'limit', limit)
end
host_speed_up(KEYS[1], ARGV[1], tonumber(ARGV[3]))
return circuit_answered(KEYS[1], ARGV[1], ARGV[4]) and 1 or 0
