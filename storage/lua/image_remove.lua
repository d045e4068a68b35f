-- Remove an image that stands on no ref, under all its names: one without layers, or one whose top ref is gone.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  digest of its manifest
-- ARGV[2]  milliseconds until objects that nothing names any more may be deleted
-- ARGV[3]  limits of the audit stream (lib/audit.lua); '' to note nothing
-- ARGV[4]  entry for it, payload
-- ARGV[5…] names that stood for it when last seen
-- return   {'removed', bytes of objects that are to be deleted}, or {'held'} (by a live lease, by one of its names),
--          {'stood-on'} (its top ref is there) or {'missing'}: then nothing has changed
-- Safe to repeat.
-- include: time
-- include: collect
-- include: audit
local prefix, manifest, now = KEYS[1], ARGV[1], now_ms()
local known = redis.call('HGET', prefix .. ':images:digest', manifest)
local image = known and cmsgpack.unpack(known)[3]
local names = {}
for i = 5, #ARGV do
  local named = redis.call('HGET', prefix .. ':images', ARGV[i])
  local fields = named and cmsgpack.unpack(named)[3]
  if fields and fields.manifest.digest == manifest then
    names[#names + 1] = ARGV[i]
    image = image or fields
  end
end
if not image then
  return {'missing'}
end
for _, name in ipairs(names) do
  if is_held(prefix, 'image:' .. name, now) then
    return {'held'}
  end
end
if type(image.ref) == 'string' and redis.call('EXISTS', prefix .. ':ref:' .. image.ref) == 1 then
  return {'stood-on'}
end
for _, name in ipairs(names) do
  redis.call('HDEL', prefix .. ':images', name)
  redis.call('DEL', prefix .. ':holders:image:' .. name)
end
redis.call('HDEL', prefix .. ':images:digest', manifest)
audit_note(prefix, ARGV[3], {ARGV[4]}, now)
return {'removed', documents_release(prefix, manifest, image.config.digest, now, tonumber(ARGV[2]))}
