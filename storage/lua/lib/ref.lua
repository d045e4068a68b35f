-- Ref records. A record is the payload ['version', 'ref', {image_refs, created_wall_s, description, …}]:
-- these three come first and in this order, so that a script can change them without touching, or
-- understanding, the rest, which another release may have written.

-- Return a record's head (through the map's header), its image refs, its creation, its description, and its tail.
local function ref_split(value)
  local after = cmsgpack.unpack_limit(value, 2, 1) -- skips version and kind; what comes first is the next offset
  local body = after + 2 -- one byte of map header: fewer than 16 fields
  local at, _, image_refs, _, created, _, description = cmsgpack.unpack_limit(value, 6, body - 1)
  if at == -1 then
    at = #value
  end
  return string.sub(value, 1, body - 1), image_refs, created, description, string.sub(value, at + 1)
end

local function ref_join(head, image_refs, created, description, tail)
  return head
    .. cmsgpack.pack('image_refs') .. cmsgpack.pack(image_refs)
    .. cmsgpack.pack('created_wall_s') .. cmsgpack.pack(created)
    .. cmsgpack.pack('description') .. cmsgpack.pack(description)
    .. tail
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
