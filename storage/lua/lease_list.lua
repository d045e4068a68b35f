-- Read all live leases, soonest expiry first, pinned last.
--
-- KEYS[1] prefix of the farm's keys
-- return  a list of {ID, expiry, created, labels, resources}
-- include: time
-- include: lease
local found = {}
for i, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1] .. ':leases', '(' .. lapse_ms(KEYS[1], now_ms()), '+inf')) do
  found[i] = lease_read(KEYS[1], id)
end
return found
