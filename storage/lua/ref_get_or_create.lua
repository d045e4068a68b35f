-- Make or find refs, parents first, and attach them to a lease, as one step: all or nothing.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] lease ID
-- ARGV[2] msgpack: a list of [ID, parent ID or "", chain ID, head, tail, image refs, description, origins] (lib/ref.lua)
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

-- Tell whether two lists are the same.
local function same(ours, theirs)
  if #ours ~= #theirs then
    return false
  end
  for i, item in ipairs(ours) do
    if item ~= theirs[i] then
      return false
    end
  end
  return true
end

for _, pair in ipairs(providers) do
  for _, provider in ipairs(pair[2]) do
    redis.call('SADD', prefix .. ':providers:' .. pair[1], provider)
  end
end

local states = {}
for i, record in ipairs(records) do
  local id, chain, image_refs, description, origins = record[1], record[3], record[6], record[7], record[8]
  local key = prefix .. ':ref:' .. id
  local value = redis.call('GET', key)
  if value then
    local known = ref_split(value)
    local all_refs, all_origins = merged(known.image_refs, image_refs), origins_merged(known.origins, origins)
    local is_described = known.description ~= '' or description == ''
    if #all_refs ~= #known.image_refs or not is_described or not same(all_origins, known.origins) then
      known.image_refs, known.origins = all_refs, all_origins
      known.description = is_described and known.description or description
      value = ref_join(known)
      redis.call('SET', key, value)
    end
  else
    value = ref_join({
      head = record[4],
      image_refs = merged(image_refs, {}),
      created = now / 1000,
      description = description,
      origins = origins_merged({}, origins),
      tail = record[5],
    })
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
