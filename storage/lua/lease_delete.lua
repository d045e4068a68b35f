-- Delete a lease. What it held is held by the others that hold it, or by nobody.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] lease ID
-- return  1 if there was a live one, else 0
-- include: time
-- include: lease
local was_live = lease_is_live(KEYS[1], ARGV[1], now_ms())
lease_drop(KEYS[1], ARGV[1])
return was_live and 1 or 0
