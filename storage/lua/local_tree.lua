-- Use a tree; record its manifest, where one is given and the farm has none.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] digest of the tree
-- ARGV[2] object key of its manifest, and
-- ARGV[3] its length in bytes; without them the tree is only used
-- return  object key of the manifest that the farm has, or nil
-- include: time
-- include: local
local prefix, tree = KEYS[1], ARGV[1]
local trees = prefix .. ':local:trees'
local key = redis.call('HGET', trees, tree)
if key and redis.call('HEXISTS', prefix .. ':local:objects', key) == 0 then
  key = nil
end
if not key and ARGV[2] then
  key = ARGV[2]
  redis.call('HSET', trees, tree, key)
  redis.call('HSET', prefix .. ':local:objects', key, ARGV[3])
  tree_stand(prefix, tree, key)
end
if key then
  redis.call('ZADD', prefix .. ':local:used', now_ms(), tree)
end
return key
