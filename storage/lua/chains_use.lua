-- Name the refs with some chain IDs, and the live leases that hold one of them.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV     chain IDs
-- return   for each chain, in their order: {ref IDs…}, {lease IDs…}, each in no order
-- include: time
-- include: lease
local prefix, now = KEYS[1], now_ms()
local answer = {}
for _, chain in ipairs(ARGV) do
  local refs = redis.call('SMEMBERS', prefix .. ':chain:' .. chain)
  local leases, seen = {}, {}
  for _, ref in ipairs(refs) do
    for _, id in ipairs(redis.call('SMEMBERS', prefix .. ':holders:ref:' .. ref)) do
      if not seen[id] and lease_is_live(prefix, id, now) then
        leases[#leases + 1] = id
      end
      seen[id] = true
    end
  end
  answer[#answer + 1] = refs
  answer[#answer + 1] = leases
end
return answer
