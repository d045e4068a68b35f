-- Turn a blob lazy again, if what is recorded is still that very upload.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] digest
-- ARGV[2] object key of the upload that was found gone or damaged
-- ARGV[3] why, for people; kept a week
-- return  1 if this changed it, else 0
local blob = KEYS[1] .. ':blob:' .. ARGV[1]
local value = redis.call('GET', blob)
if not value or cmsgpack.unpack(value)[3].key ~= ARGV[2] then
  return 0
end
redis.call('DEL', blob)
redis.call('SET', KEYS[1] .. ':absent:' .. ARGV[1], ARGV[3], 'EX', 604800)
return 1
