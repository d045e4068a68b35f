-- Tell which contents the farm lacks; let a tree stand on the objects of the others.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  digest of the tree; '' for none
-- ARGV[2…] digests of contents
-- return   places in the list, from 1, of those that are lacking
-- include: time
-- include: local
local prefix, tree, missing = KEYS[1], ARGV[1], {}
if tree ~= '' then
  redis.call('ZADD', prefix .. ':local:used', now_ms(), tree)
end
for i = 2, #ARGV do
  local key = object_of(prefix, ARGV[i])
  if not key then
    missing[#missing + 1] = i - 1
  elseif tree ~= '' then
    tree_stand(prefix, tree, key)
  end
end
return missing
