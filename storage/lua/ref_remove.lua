-- Remove a ref with all that is recorded of it, and with the images that it is the top of, unless something holds it.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  ref ID
-- ARGV[2]  milliseconds until objects that nothing names any more may be deleted
-- ARGV[3]  limits of the audit stream (lib/audit.lua); '' to note nothing
-- ARGV[4]  entry for it, payload
-- ARGV[5]  number of image names
-- ARGV[6…] image names, then manifest digests, of images whose top it was when last seen
-- return   {'removed', bytes of objects that are to be deleted}, or {'held'} (by a live lease, it or one of the
--          images), {'stood-on'} (another ref is on top of it) or {'missing'}: then nothing has changed
-- Safe to repeat.
-- include: time
-- include: collect
-- include: audit
local prefix, id, grace, names = KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[5])
local now = now_ms()
local key = prefix .. ':ref:' .. id
local value = redis.call('GET', key)
if not value then
  return {'missing'}
end

-- Return the images of a table that this ref is the top of, by the field they are in.
local function images_of(tbl, first, last)
  local found = {}
  for i = first, last do
    local image = redis.call('HGET', prefix .. tbl, ARGV[i])
    local fields = image and cmsgpack.unpack(image)[3]
    if fields and fields.ref == id then
      found[ARGV[i]] = fields
    end
  end
  return found
end

local named = images_of(':images', 6, 5 + names)
local held = is_held(prefix, 'ref:' .. id, now)
for name in pairs(named) do
  held = held or is_held(prefix, 'image:' .. name, now)
end
if held then
  return {'held'}
end
if names_a_ref(prefix, children_key(prefix, id)) then
  return {'stood-on'}
end

local record = cmsgpack.unpack(value)[3]
local digest = record.blob.digest
redis.call('DEL', key, prefix .. ':holders:ref:' .. id, children_key(prefix, id))
redis.call('ZREM', prefix .. ':refs', id)
redis.call('ZREM', prefix .. ':refs:used', id)
redis.call('HDEL', prefix .. ':refs:count', id)
redis.call('HDEL', prefix .. ':images:ref', id)
redis.call('SREM', prefix .. ':chain:' .. record.chain, id)
redis.call('SREM', users_key(prefix, digest), id)
if type(record.parent) == 'string' then
  redis.call('SREM', children_key(prefix, record.parent), id)
end

local freed = blob_condemn(prefix, digest, now, grace) or 0
if redis.call('EXISTS', users_key(prefix, digest)) == 0 then
  redis.call('DEL', prefix .. ':providers:' .. digest)
end
local documents = images_of(':images:digest', 6 + names, #ARGV)
for name, image in pairs(named) do
  redis.call('HDEL', prefix .. ':images', name)
  redis.call('DEL', prefix .. ':holders:image:' .. name)
  documents[image.manifest.digest] = image
end
for manifest in pairs(documents) do
  redis.call('HDEL', prefix .. ':images:digest', manifest)
end
for manifest, image in pairs(documents) do
  freed = freed + documents_release(prefix, manifest, image.config.digest, now, grace)
end
audit_note(prefix, ARGV[3], {ARGV[4]}, now)
return {'removed', freed}
