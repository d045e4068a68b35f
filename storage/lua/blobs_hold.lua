-- Hold those of some blobs that are present by a live lease, and tell which these are: what is told to be present is
-- held, and no collection comes between.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  lease ID
-- ARGV[2…] digests
-- return   for each digest its payload, false where it is not present; or nil if there is no such live lease
-- Safe to repeat.
-- include: time
-- include: lease
local prefix, id = KEYS[1], ARGV[1]
local now = now_ms()
leases_sweep(prefix, now)
if not lease_is_live(prefix, id, now) then
  return nil
end
local found = {}
for i = 2, #ARGV do
  local blob = redis.call('GET', prefix .. ':blob:' .. ARGV[i])
  if blob then
    lease_hold(prefix, id, 'blob:' .. ARGV[i])
  end
  found[i - 1] = blob
end
return found
