-- Hold resources by a live lease.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  lease ID
-- ARGV[2…] resources
-- return   1, or 0 if there is no such live lease: then nothing has changed for it
-- include: time
-- include: lease
local prefix, id = KEYS[1], ARGV[1]
local now = now_ms()
leases_sweep(prefix, now)
if not lease_is_live(prefix, id, now) then
  return 0
end
for i = 2, #ARGV do
  lease_hold(prefix, id, ARGV[i])
end
return 1
