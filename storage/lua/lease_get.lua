-- Read a live lease.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] lease ID
-- return  {ID, expiry, created, labels, resources}, or nil
-- include: time
-- include: lease
if not lease_is_live(KEYS[1], ARGV[1], now_ms()) then
  return false
end
return lease_read(KEYS[1], ARGV[1])
