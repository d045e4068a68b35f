-- Record a success: the limit grows by one for as many successes as it is high, and so does the rate.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] host
-- ARGV[2] configured limit
-- ARGV[3] configured requests a second, 0 for any
-- return  the limit now, rounded down
-- include: host
-- include: rate
local configured = tonumber(ARGV[2])
local limit, is_reduced = host_limit(KEYS[1], ARGV[1], configured)
if is_reduced then
  limit = math.min(configured, limit + 1 / limit)
  host_set(KEYS[1], ARGV[1], 'limit', limit)
end
host_speed_up(KEYS[1], ARGV[1], tonumber(ARGV[3]))
return math.floor(limit)
