-- Forget some of the contents whose objects are gone.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] cursor, '0' at first
-- ARGV[2] how many to look at, about
-- return  the next cursor; '0' at the end
-- include: local
local files = KEYS[1] .. ':local:files'
local found = redis.call('HSCAN', files, ARGV[1], 'COUNT', ARGV[2])
for i = 1, #found[2], 2 do
  if not object_of(KEYS[1], found[2][i]) then
    redis.call('HDEL', files, found[2][i])
  end
end
return found[1]
