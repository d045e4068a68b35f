-- Drivers' directories. PREFIX:local:files says of a content in which object it lies; PREFIX:local:objects has the
-- objects that are there: what a record says of another one is nothing. A tree stands on the objects of its files and of
-- its manifest, PREFIX:local:stands:TREE; PREFIX:local:users:KEY are the trees that stand on an object.

local function stands_key(prefix, tree)
  return prefix .. ':local:stands:' .. tree
end

local function tree_users_key(prefix, key)
  return prefix .. ':local:users:' .. key
end

-- Tell in which object that is there a content lies; nil for none.
local function object_of(prefix, digest)
  local packed = redis.call('HGET', prefix .. ':local:files', digest)
  local key = packed and cmsgpack.unpack(packed)[3].key
  return key and redis.call('HEXISTS', prefix .. ':local:objects', key) == 1 and key or nil
end

local function tree_stand(prefix, tree, key)
  redis.call('SADD', stands_key(prefix, tree), key)
  redis.call('SADD', tree_users_key(prefix, key), tree)
end
