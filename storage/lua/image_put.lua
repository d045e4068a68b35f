-- Record an image under its name, its manifest digest and its top ref, and attach it to a lease.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] lease ID
-- ARGV[2] image name
-- ARGV[3] manifest digest
-- ARGV[4] top ref ID, or ''
-- ARGV[5] the payload's start, through its map's header
-- ARGV[6] the rest of the payload, but for `created_wall_s`
-- return  the payload, or nil if there is no such live lease: then nothing has changed
-- include: time
-- include: lease
local prefix, lease, name = KEYS[1], ARGV[1], ARGV[2]
local now = now_ms()
if not lease_is_live(prefix, lease, now) then
  return false
end
local image = ARGV[5] .. cmsgpack.pack('created_wall_s') .. cmsgpack.pack(now / 1000) .. ARGV[6]
redis.call('HSET', prefix .. ':images', name, image)
redis.call('HSET', prefix .. ':images:digest', ARGV[3], image)
if ARGV[4] ~= '' then
  redis.call('HSET', prefix .. ':images:ref', ARGV[4], image)
end
lease_hold(prefix, lease, 'image:' .. name)
return image
