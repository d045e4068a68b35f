-- Turn blobs absent that no ref uses and no live lease holds; their objects are to be deleted.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  milliseconds until the objects may be deleted
-- ARGV[2…] digests
-- return   for each, bytes of its object, or -1 where it stays or isn't present
-- Safe to repeat.
-- include: time
-- include: collect
local now = now_ms()
local freed = {}
for i = 2, #ARGV do
  freed[#freed + 1] = blob_condemn(KEYS[1], ARGV[i], now, tonumber(ARGV[1])) or -1
end
return freed
