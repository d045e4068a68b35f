-- Move a live lease's expiry. A pinned one stays pinned.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] lease ID
-- ARGV[2] milliseconds from now
-- return  1, or 0 if there is no such live lease: then nothing has changed for it
-- include: time
-- include: lease
local prefix, id = KEYS[1], ARGV[1]
local now = now_ms()
leases_sweep(prefix, now)
if not lease_is_live(prefix, id, now) then
  return 0
end
local leases = prefix .. ':leases'
if redis.call('ZSCORE', leases, id) ~= 'inf' then
  redis.call('ZADD', leases, now + tonumber(ARGV[2]), id)
end
return 1
