-- Read objects that may be deleted now: no record names them, and nobody has read them for as long as the grace is.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] how many at most
-- return  a list of 'DIGEST KEY', the longest due first; the digest is '-' where none is known
-- include: time
local prefix, now = KEYS[1], now_ms()
local due = {}
for _, doomed in ipairs(redis.call('ZRANGEBYSCORE', prefix .. ':deleting', '-inf', now, 'LIMIT', 0, ARGV[1])) do
  local digest, key = string.match(doomed, '^(%S+) (.+)$')
  local value = redis.call('GET', prefix .. ':blob:' .. digest)
  local is_named = value and cmsgpack.unpack(value)[3].key == key
  if is_named or (digest == '-' and redis.call('HEXISTS', prefix .. ':local:objects', key) == 1) then
    redis.call('ZREM', prefix .. ':deleting', doomed) -- a fail-over brought its record back, or that comes late
  else
    due[#due + 1] = doomed
  end
end
return due
