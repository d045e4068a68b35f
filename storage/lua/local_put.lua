-- Record an object of a driver's files, and where in it each content lies that no object has yet.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  object key
-- ARGV[2]  its length in bytes
-- ARGV[3…] digest of a content, where it lies (payload), digest, …
-- return   how many contents were recorded
-- Safe to repeat. The first record of a content stands: the trees that stand on its object would not know of another.
-- include: local
local prefix, recorded = KEYS[1], 0
redis.call('HSET', prefix .. ':local:objects', ARGV[1], ARGV[2])
for i = 3, #ARGV, 2 do
  if not object_of(prefix, ARGV[i]) then
    redis.call('HSET', prefix .. ':local:files', ARGV[i], ARGV[i + 1])
    recorded = recorded + 1
  end
end
return recorded
