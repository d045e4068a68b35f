-- Remove an image that stands on no ref: one without layers, or one whose top ref is gone.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] its name, or the digest of its manifest
-- ARGV[2] table: 'images' or 'images:digest'
-- ARGV[3] milliseconds until objects that nothing names any more may be deleted
-- return  as ref_remove
-- Safe to repeat.
-- include: time
-- include: collect
local prefix, field, tbl = KEYS[1], ARGV[1], KEYS[1] .. ':' .. ARGV[2]
local now = now_ms()
local value = redis.call('HGET', tbl, field)
if not value then
  return {'missing'}
end
local image = cmsgpack.unpack(value)[3]
if is_held(prefix, 'image:' .. image.name, now) then
  return {'held'}
end
if type(image.ref) == 'string' and redis.call('EXISTS', prefix .. ':ref:' .. image.ref) == 1 then
  return {'stood-on'}
end
redis.call('HDEL', tbl, field)
redis.call('DEL', prefix .. ':holders:image:' .. image.name)
if ARGV[2] == 'images' then
  local known = redis.call('HGET', prefix .. ':images:digest', image.manifest.digest)
  if known and cmsgpack.unpack(known)[3].name == image.name then
    redis.call('HDEL', prefix .. ':images:digest', image.manifest.digest)
  end
end
return {'removed', documents_release(prefix, image.manifest.digest, image.config.digest, now, tonumber(ARGV[3]))}
