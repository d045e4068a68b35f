-- Describe a ref that has no description yet.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] ref ID
-- ARGV[2] description
-- return  1 if it was set, else 0
-- include: ref
local key = KEYS[1] .. ':ref:' .. ARGV[1]
local value = redis.call('GET', key)
if not value then
  return 0
end
local head, image_refs, created, description, tail = ref_split(value)
if description ~= '' then
  return 0
end
redis.call('SET', key, ref_join(head, image_refs, created, ARGV[2], tail))
return 1
