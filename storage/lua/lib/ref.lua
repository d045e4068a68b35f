-- Ref records. A record is the payload ['version', 'ref', {image_refs, created_wall_s, description, origins, …}]:
-- these four come first and in this order, so that a script can change them without touching, or
-- understanding, the rest, which another release may have written. An older one wrote no origins.

-- Origins that are kept of one ref (cluster/origin.py).
local MAX_ORIGINS = 16

-- Return the parts of a record: its head (through the map's header), what is merged, and its tail.
local function ref_split(value)
  local after = cmsgpack.unpack_limit(value, 2, 1) -- skips version and kind; what comes first is the next offset
  local body = after + 2 -- one byte of map header: fewer than 16 fields
  local at, _, image_refs, _, created, _, description = cmsgpack.unpack_limit(value, 6, body - 1)
  local head, origins = string.sub(value, 1, body - 1), nil
  if at ~= -1 then
    local next_at, name, found = cmsgpack.unpack_limit(value, 2, at)
    if name == 'origins' then
      at, origins = next_at, found
    end
  end
  if not origins then
    origins = {}
    head = string.sub(head, 1, -2) .. string.char(string.byte(head, -1) + 1)
  end
  return {
    head = head,
    image_refs = image_refs,
    created = created,
    description = description,
    origins = origins,
    tail = at == -1 and '' or string.sub(value, at + 1),
  }
end

local function ref_join(parts)
  return parts.head
    .. cmsgpack.pack('image_refs') .. cmsgpack.pack(parts.image_refs)
    .. cmsgpack.pack('created_wall_s') .. cmsgpack.pack(parts.created)
    .. cmsgpack.pack('description') .. cmsgpack.pack(parts.description)
    .. cmsgpack.pack('origins') .. cmsgpack.pack(parts.origins)
    .. parts.tail
end

-- Return what is kept of two lists of origins: the added first, each once, the open one (empty) alone.
local function origins_merged(stored, added)
  local seen, all = {}, {}
  for _, list in ipairs({added, stored}) do
    for _, origin in ipairs(list) do
      if origin == '' then
        return {''}
      end
      if not seen[origin] and #all < MAX_ORIGINS then
        seen[origin] = true
        all[#all + 1] = origin
      end
    end
  end
  return all
end

-- Return {record, blob record or false, providers} of a ref whose record is `value`.
local function ref_state(prefix, value)
  local digest = cmsgpack.unpack(value)[3].blob.digest
  return {
    value,
    redis.call('GET', prefix .. ':blob:' .. digest),
    redis.call('SMEMBERS', prefix .. ':providers:' .. digest),
  }
end

-- Mark a ref used.
local function ref_used(prefix, id, now)
  redis.call('ZADD', prefix .. ':refs:used', now, id)
  redis.call('HINCRBY', prefix .. ':refs:count', id, 1)
end
