-- Attach refs to a lease and mark them used, all or none.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  lease ID
-- ARGV[2…] ref IDs
-- return   {'ok'}, {'lease'} if there is no such live lease, or {'missing', ID}
-- include: time
-- include: lease
-- include: ref
local prefix, lease = KEYS[1], ARGV[1]
local now = now_ms()
if not lease_is_live(prefix, lease, now) then
  return {'lease'}
end
for i = 2, #ARGV do
  if redis.call('EXISTS', prefix .. ':ref:' .. ARGV[i]) == 0 then
    return {'missing', ARGV[i]}
  end
end
for i = 2, #ARGV do
  ref_used(prefix, ARGV[i], now)
  lease_hold(prefix, lease, 'ref:' .. ARGV[i])
end
return {'ok'}
