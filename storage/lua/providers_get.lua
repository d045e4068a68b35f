-- Read the providers known for digests.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1…] digests
-- return   for each: providers, unsorted
local providers = {}
local prefix = KEYS[1] .. ':providers:'
for i = 1, #ARGV do
  providers[i] = redis.call('SMEMBERS', prefix .. ARGV[i])
end
return providers
