-- Make or find refs, parents first, and attach them to a lease, as one step: all or nothing.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] lease ID
-- ARGV[2] msgpack: a list of [ID, parent ID or "", chain ID, head, tail, image refs, description] (lib/ref.lua)
-- ARGV[3] msgpack: a list of [digest, [provider, …]]
-- return  {'ok', {state, …}}, {'lease'} if there is no such live lease, {'parent', ID} if a parent is
--         neither stored nor earlier in the list; in both cases nothing has changed
-- include: time
-- include: lease
-- include: ref
local prefix, lease = KEYS[1], ARGV[1]
local records, providers = cmsgpack.unpack(ARGV[2]), cmsgpack.unpack(ARGV[3])
local now = now_ms()

if not lease_is_live(prefix, lease, now) then
  return {'lease'}
end
local here = {}
for _, record in ipairs(records) do
  local id, parent = record[1], record[2]
  if parent ~= '' and not here[parent] and redis.call('EXISTS', prefix .. ':ref:' .. parent) == 0 then
    return {'parent', parent}
  end
  here[id] = true
end

-- Return the image refs of both lists, sorted, each once.
local function merged(ours, theirs)
  local seen, all = {}, {}
  for _, list in ipairs({ours, theirs}) do
    for _, image_ref in ipairs(list) do
      if not seen[image_ref] then
        seen[image_ref] = true
        all[#all + 1] = image_ref
      end
    end
  end
  table.sort(all)
  return all
end

for _, pair in ipairs(providers) do
  for _, provider in ipairs(pair[2]) do
    redis.call('SADD', prefix .. ':providers:' .. pair[1], provider)
  end
end

local states = {}
for i, record in ipairs(records) do
  local id, chain, head, tail, image_refs, description = record[1], record[3], record[4], record[5], record[6], record[7]
  local key = prefix .. ':ref:' .. id
  local stored = redis.call('GET', key)
  local value
  if stored then
    local old_head, old_refs, created, old_description, old_tail = ref_split(stored)
    local all = merged(old_refs, image_refs)
    if #all == #old_refs and (old_description ~= '' or description == '') then
      value = stored
    else
      value = ref_join(old_head, all, created, old_description ~= '' and old_description or description, old_tail)
      redis.call('SET', key, value)
    end
  else
    value = ref_join(head, merged(image_refs, {}), now / 1000, description, tail)
    redis.call('SET', key, value)
    redis.call('ZADD', prefix .. ':refs', 0, id)
    redis.call('SADD', prefix .. ':chain:' .. chain, id)
    redis.call('SADD', prefix .. ':users:' .. cmsgpack.unpack(value)[3].blob.digest, id)
    if record[2] ~= '' then
      redis.call('SADD', prefix .. ':children:' .. record[2], id)
    end
  end
  ref_used(prefix, id, now)
  lease_hold(prefix, lease, 'ref:' .. id)
  states[i] = ref_state(prefix, value)
end
return {'ok', states}
