-- Remove a tree that nobody holds and nobody has used since, and the objects that no other tree stands on.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] digest of the tree; '' for none: then ARGV[4] alone, if no tree stands on it
-- ARGV[2] when it was last used, as seen, milliseconds
-- ARGV[3] milliseconds until the objects may be deleted
-- ARGV[4] object key, without a tree
-- return  {'removed', bytes freed}, {'held'}, {'stood-on'} or {'missing'}
-- include: time
-- include: collect
-- include: local
local prefix, tree, now, freed = KEYS[1], ARGV[1], now_ms(), 0
local objects = prefix .. ':local:objects'

-- Have an object deleted on which nothing stands.
local function object_remove(key)
  local size = redis.call('HGET', objects, key)
  if not size then
    return 'missing'
  elseif redis.call('EXISTS', tree_users_key(prefix, key)) == 1 then
    return 'stood-on'
  elseif is_held(prefix, 'object:' .. key, now) then
    return 'held'
  end
  redis.call('HDEL', objects, key)
  redis.call('ZADD', prefix .. ':deleting', now + tonumber(ARGV[3]), '- ' .. key)
  freed = freed + tonumber(size)
  return 'removed'
end

if tree == '' then
  local outcome = object_remove(ARGV[4])
  return outcome == 'removed' and {outcome, freed} or {outcome}
end
local used = redis.call('ZSCORE', prefix .. ':local:used', tree)
if not used then
  return {'missing'}
elseif tonumber(used) > tonumber(ARGV[2]) or is_held(prefix, 'tree:' .. tree, now) then
  return {'held'}
end
local stands = stands_key(prefix, tree)
for _, key in ipairs(redis.call('SMEMBERS', stands)) do
  redis.call('SREM', tree_users_key(prefix, key), tree)
  object_remove(key)
end
redis.call('DEL', stands)
redis.call('ZREM', prefix .. ':local:used', tree)
redis.call('HDEL', prefix .. ':local:trees', tree)
return {'removed', freed}
