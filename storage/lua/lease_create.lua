-- Make a lease, or renew the live one of that ID (which keeps its labels; a pinned one stays pinned).
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] lease ID
-- ARGV[2] milliseconds to live, or 'inf': pinned
-- ARGV[3] labels, payload
-- return  {ID, expiry, created, labels, resources}
-- include: time
-- include: lease
local prefix, id, ttl = KEYS[1], ARGV[1], ARGV[2]
local now = now_ms()
local leases = prefix .. ':leases'
leases_sweep(prefix, now)
local expires = ttl == 'inf' and 'inf' or now + tonumber(ttl)
if not lease_is_live(prefix, id, now) then
  lease_drop(prefix, id) -- a lapsed one of that ID must not hand down what it held
  lease_write(prefix, id, now, expires, ARGV[3])
elseif redis.call('ZSCORE', leases, id) ~= 'inf' then
  redis.call('ZADD', leases, expires, id)
end
return lease_read(prefix, id)
