-- Name the live leases that hold a resource.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] resource
-- return  lease IDs, in no order
-- include: time
-- include: lease
local now = now_ms()
local found = {}
for _, id in ipairs(redis.call('SMEMBERS', KEYS[1] .. ':holders:' .. ARGV[1])) do
  if lease_is_live(KEYS[1], id, now) then
    found[#found + 1] = id
  end
end
return found
