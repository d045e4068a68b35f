-- Tell by which of several (identity, source) each digest is proven.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  number of these
-- ARGV[2…] them, then the digests (some thousands at most: they are passed on as one command's arguments)
-- return   for each digest the indexes of those, from 0
-- include: time
local count = tonumber(ARGV[1])
local now = now_ms()
local digests, proven = {}, {}
for i = count + 2, #ARGV do
  digests[#digests + 1] = ARGV[i]
  proven[#proven + 1] = {}
end
for i = 2, count + 1 do
  for at, expires in ipairs(redis.call('ZMSCORE', KEYS[1] .. ':proof:' .. ARGV[i], unpack(digests))) do
    if expires and tonumber(expires) > now then
      table.insert(proven[at], i - 2)
    end
  end
end
return proven
